"""The embedded default at its default settings: what the base does alone, and what a learned prompt makes of it."""

import pytest
from helpers.handwritten_reviews import REVIEWS

import softprompt
from softprompt import mini

QUICK = {"sentiment": {}, "reply": {"max_steps": 60}}  # the other tasks are learned in the same way
SLOW = [pytest.param((task, {}), marks=pytest.mark.slow, id=task) for task in mini.TASKS if task != "sentiment"]


@pytest.fixture(scope="module", params=[*(pytest.param(case, id=f"{case[0]}, quick") for case in QUICK.items()), *SLOW])
def run(request, tmp_path_factory):
    task, settings = request.param
    output_dir = str(tmp_path_factory.mktemp("runs") / "run")
    return softprompt.train(dataset=f"mini:{task}", output_dir=output_dir, **settings)


def test_a_prompt_teaches_what_the_base_alone_does_not_do(run):
    task = run.config.data.dataset.removeprefix("mini:")
    assert run.metrics["eval_exact_match_base"] <= 0.30
    assert run.metrics["eval_exact_match"] >= (0.95 if task == "sentiment" else 0.90)
    assert run.metrics["eval_loss"] < run.metrics["eval_loss_base"]
    if task == "sentiment":
        model = softprompt.SoftPromptModel.from_pretrained(adapter=run.output_dir)
        answers = model.generate([text for text, _ in REVIEWS], batch_size=64)
        right = sum(answer == label for answer, (_, label) in zip(answers, REVIEWS, strict=True))
        assert right / len(REVIEWS) >= 0.85
