"""What must not change when a run is resumed: order and truncation of its rows, held-out rows, tokenizer, metric.
Changes are refused, or printed if --ignore_data_skip allows them."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers.short_runs import interrupted, rewrite_state
from transformers import AutoTokenizer

import softprompt
from softprompt.utils.errors import CheckpointError

ROWS = [{"instruction": f"第{i}题" * (1 + i % 3), "output": "好" if i % 2 else "坏"} for i in range(15)]


def lines(rows) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


@pytest.fixture(params=[False, True], ids=["listed", "streamed"])
def run(request, tiny_base, tmp_path, monkeypatch):
    """Settings of a run of 9 steps over 11 rows in windows of 4, evaluated every second step. It was killed after step
    5 and has saved step 4, which is in the second epoch."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(lines(ROWS[4:]))
    Path("held.jsonl").write_text(lines(ROWS[:4]))
    settings = {
        **{"model_name_or_path": str(tiny_base), "dataset": "rows.jsonl", "eval_dataset": "held.jsonl"},
        **{"max_steps": 9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "output_dir": "run"},
        **{"save_steps": 2, "eval_steps": 2, "streaming": request.param},
        **({"buffer_size": 5} if request.param else {}),
    }
    interrupted(settings, 5)
    return settings


def evaluated() -> list[int]:
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "eval_loss" in record]


OTHERS = [
    {"seed": 7},
    {"per_device_train_batch_size": 4},
    {"gradient_accumulation_steps": 1},
    {"max_length": 20},
    {"truncation_side": "input"},
    {"template": "{instruction}"},
]


@pytest.mark.parametrize("given", OTHERS, ids=lambda given: next(iter(given)))
def test_changed_row_order_or_truncation_is_refused(given, run, capsys):
    (flag,) = given
    with pytest.raises(CheckpointError, match=rf"checkpoint-4: .*--{flag}.*now .*--ignore_data_skip"):
        softprompt.train(resume_from_checkpoint="run", **given)
    assert not Path("run/checkpoint-6").exists()
    capsys.readouterr()
    softprompt.train(resume_from_checkpoint="run", ignore_data_skip=True, **given)
    assert f"--{flag}" in capsys.readouterr().out and evaluated() == [2, 4, 6, 8, 9]


def test_batch_shape_may_change_if_the_step_has_as_many_rows(run, capsys):
    softprompt.train(resume_from_checkpoint="run", per_device_train_batch_size=4, gradient_accumulation_steps=1)
    assert "may be repeated" not in capsys.readouterr().out


def test_renamed_columns(run):
    """Listed rows are compared after renaming. Of a stream, --columns itself is compared, and may not change."""
    streams = run["streaming"]
    renamed = [{"q" if name == "instruction" else name: text for name, text in row.items()} for row in ROWS]
    if streams:
        Path("rows.jsonl").write_text(lines([{**row, "q": row["output"]} for row in ROWS[4:]]))
    else:
        Path("rows.jsonl").write_text(lines(renamed[4:]))
        Path("held.jsonl").write_text(lines(renamed[:4]))
        softprompt.train(resume_from_checkpoint="run", columns="instruction=q", template="default")
        return
    with pytest.raises(CheckpointError, match="--columns"):
        softprompt.train(resume_from_checkpoint="run", columns="instruction=q")


def test_changed_seed_restarts_the_epoch_of_a_stream(run):
    """Five more steps: to the end of the second epoch, then two of the third."""
    again = softprompt.train(resume_from_checkpoint="run", seed=7, ignore_data_skip=True)
    assert again.metrics["epoch"] == pytest.approx(2 + 8 / 11 if run["streaming"] else 3, abs=1e-3)


def test_edited_held_out_rows_are_refused(run, capsys):
    Path("held.jsonl").write_text(lines([{**ROWS[0], "output": "新"}, *ROWS[1:4]]))
    with pytest.raises(CheckpointError, match=r"checkpoint-4: the held-out rows named now differ .*--ignore_data_skip"):
        softprompt.train(resume_from_checkpoint="run")
    softprompt.train(resume_from_checkpoint="run", ignore_data_skip=True, load_best_model_at_end=True)
    assert json.loads(Path("run/all_results.json").read_text())["best_global_step"] > 4
    Path("held.jsonl").write_text(lines(ROWS[:4]))
    Path("other.jsonl").write_text(lines(ROWS[:4]))
    for checkpoint in Path("run").glob("checkpoint-[6-9]"):
        shutil.rmtree(checkpoint)
    softprompt.train(resume_from_checkpoint="run", eval_dataset="other.jsonl")  # the same rows in another file


def test_held_out_rows_may_be_added(run, capsys):
    shutil.rmtree("run")
    without = {name: value for name, value in run.items() if not name.startswith("eval_")}
    interrupted(without, 5)
    softprompt.train(resume_from_checkpoint="run", eval_dataset="held.jsonl", eval_steps=3)
    assert evaluated() == [6, 9]


def test_changed_metric_restarts_the_search_for_the_best(run, capsys):
    begun = {**run, "eval_steps": 2, "load_best_model_at_end": True}
    shutil.rmtree("run")
    interrupted(begun, 5)
    capsys.readouterr()
    run = softprompt.train(resume_from_checkpoint="run", metric_for_best_model="exact_match")
    results = run.metrics
    assert results["best_global_step"] > 4 and results["best_metric"] == results["eval_exact_match"]
    assert "the search for the best starts again" in capsys.readouterr().out


def test_best_step_that_was_not_saved_is_not_taken(run, capsys, monkeypatch):
    shutil.rmtree("run")
    interrupted({**run, "eval_steps": 3, "save_steps": 4}, 5)
    state = json.loads(Path("run/checkpoint-4/trainer_state.json").read_text())
    assert state["best"]["step"] == 3 and not Path("run/checkpoint-3").exists()
    done = softprompt.train(resume_from_checkpoint="run", load_best_model_at_end=True)
    assert done.metrics["best_global_step"] in (6, 9)
    assert "not whole" not in capsys.readouterr().err


def other_base(base, change) -> str:
    shutil.copytree(base, "other", dirs_exist_ok=True)
    change(Path("other"))
    return "other"


def reconfigured(**settings):
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


def test_changed_part_of_the_tokenizer_is_named(run):
    cases = {
        "eos_token": reconfigured(eos_token="<s>"),
        "chat_template": lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        "pad_token": reconfigured(pad_token="<unk>"),
        "settings": reconfigured(split_special_tokens=True),
        "tokenizer.json": reconfigured(extra_special_tokens=["第"]),
    }
    for name, change in cases.items():
        shutil.rmtree("other", ignore_errors=True)
        base = other_base(run["model_name_or_path"], change)
        with pytest.raises(CheckpointError, match=rf"the tokenizer.*{name}.* named now differs in content"):
            softprompt.train(resume_from_checkpoint="run", model_name_or_path=base)


def test_checkpoint_of_an_earlier_version_resumes(run, capsys):
    """It has fingerprints of the rows, tokenizer.json and the base, which are compared; the others are named."""
    backend = AutoTokenizer.from_pretrained(run["model_name_or_path"]).backend_tokenizer

    def earlier(state):
        kept = {name: state["fingerprints"][name] for name in ("dataset", "base")}
        old = hashlib.sha256(backend.to_str().encode()).hexdigest()
        return state | {"fingerprints": {**kept, "tokenizer": old}}

    rewrite_state(Path("run/checkpoint-4"), earlier)
    base = other_base(run["model_name_or_path"], reconfigured(extra_special_tokens=["第"]))
    with pytest.raises(CheckpointError, match="the tokenizer named now differs in content"):
        softprompt.train(resume_from_checkpoint="run", model_name_or_path=base)
    capsys.readouterr()
    softprompt.train(resume_from_checkpoint="run")
    told = [line for line in capsys.readouterr().out.splitlines() if "not compared" in line]
    assert len(told) == 1 and "held-out rows" in told[0] and "eos_token" in told[0]


@pytest.mark.parametrize("was, now", [("bf16", "fp16"), ("fp16", "bf16")])
def test_precision_may_change(was, now, run):
    shutil.rmtree("run")
    interrupted({**run, was: True}, 5)
    assert getattr(softprompt.train(resume_from_checkpoint="run", **{now: True}).config.model, now)
