"""Distillation: how near a prompt comes to a text, by the number of virtual tokens and of questions.

python benchmarks/distillation.py --model_name_or_path BASE --text system.txt --questions questions.txt
    [--template '…'] [--num_virtual_tokens 4 8 16 32 64] [--num_questions 8 30] [--starts first spread]
    [--prompt_reparameterization mlp] [--self_study] [--eval_rows 40] [--seed 42] [--bf16] [--json FILE]

One run for each number of virtual tokens, with all training questions, and one for each number of questions (the first
ones), with the prompt of 16 tokens. The last --eval_rows questions are held out in each. The prompt starts from the
first tokens of the text, or, with --starts spread, from tokens that are evenly spaced over it. With --self_study, the
base writes as many training questions itself, as with --distill_context. A line of a Markdown table is printed after
each run: KL per token and agreement of the prompt, of the text cut to its length, and of the bare base. --json FILE
stores finished runs, and the same command continues.
"""

import contextlib
import io
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from arguments import ArgumentParser

import softprompt
from softprompt.data.questions import read_distilled_text
from softprompt.models.loading import base_path, load_base, load_tokenizer
from softprompt.prompt.adapter_folder import adapter_files, peft_config
from softprompt.prompt.adapter_io import Adapter
from softprompt.prompt.soft_prompt import InputEmbeddings
from softprompt.utils.atomic_io import write_folder

USUAL_TOKENS = 16
FIGURES = (
    *("eval_kl", "eval_kl_low", "eval_kl_high", "eval_agreement", "eval_kl_cut", "eval_agreement_cut"),
    *("eval_kl_base", "eval_agreement_base"),
)
OF_A_RUN = {  # settings on which a run depends
    *("model_name_or_path", "text", "questions", "template", "eval_rows", "distill_samples", "distill_max_new_tokens"),
    *("max_steps", "rows", "learning_rate", "seed", "bf16", "prompt_reparameterization", "self_study"),
}
OPTIONAL = ("template", "learning_rate", "bf16", "prompt_reparameterization")  # settings whose default is the program's
STARTS = ("first", "spread")  # which tokens of the text the prompt starts from
MORE = (
    *("answers", "answers_not_ended", "tokens_saved", "time_to_first_token", "time_to_first_token_text"),
    "train_runtime",
)


def main() -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model_name_or_path", default="mini")
    parser.add_argument("--text", required=True, help="the file of --distill_prompt")
    parser.add_argument("--questions", required=True, help="a .txt with one question on each line")
    parser.add_argument("--template")
    parser.add_argument("--num_virtual_tokens", nargs="*", type=int, default=[4, 8, 16, 32, 64])
    parser.add_argument("--num_questions", nargs="*", type=int, default=[])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=["first"])
    parser.add_argument("--eval_rows", type=int, default=40)
    parser.add_argument("--distill_samples", type=int, default=6)
    parser.add_argument("--distill_max_new_tokens", type=int, default=40)
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=16, help="rows of a step")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--prompt_reparameterization")
    parser.add_argument("--self_study", action="store_true", help="the base writes the training questions")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--json", type=Path, help="a file that stores finished runs")
    args = parser.parse_args()
    questions = Path(args.questions).read_text(encoding="utf-8").splitlines()
    train, held_out = questions[: -args.eval_rows], questions[-args.eval_rows :]
    sizes = [(P, len(train)) for P in args.num_virtual_tokens] + [(USUAL_TOKENS, n) for n in args.num_questions]
    cases = itertools.product(dict.fromkeys(sizes), args.starts)
    stored: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    print(f"| virtual tokens | questions | start | {' | '.join((*FIGURES, *MORE))} |")
    print("|" + " --- |" * (3 + len(FIGURES) + len(MORE)))
    for (P, n), start in cases:
        key = json.dumps([P, n, start, *(value for name, value in sorted(vars(args).items()) if name in OF_A_RUN)])
        if key not in stored:
            stored[key] = trained(args, train[:n], held_out, P, start)
            if args.json:
                args.json.write_text(json.dumps(stored, indent=1))
        figures = [f"{stored[key][name]:.4g}" for name in (*FIGURES, *MORE)]
        print(f"| {P} | {n} | {start} | {' | '.join(figures)} |", flush=True)


def trained(args: Any, train: list[str], held_out: list[str], P: int, start: str) -> dict[str, Any]:
    """Train a prompt of P virtual tokens, and return its metrics."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        given = {name: value for name in OPTIONAL if (value := getattr(args, name))}
        if args.self_study:
            given |= {"distill_context": args.text, "distill_questions": len(train)}
        else:
            given |= {"distill_prompt": args.text, "dataset": write_questions(Path(folder) / "train.txt", train)}
        if start == "spread":
            given["init_adapter"] = str(write_spread_start(args, P, Path(folder) / "start"))
        run = softprompt.train(
            model_name_or_path=args.model_name_or_path,
            eval_dataset=write_questions(Path(folder) / "held_out.txt", held_out),
            distill_samples=args.distill_samples,
            distill_max_new_tokens=args.distill_max_new_tokens,
            num_virtual_tokens=P,
            max_steps=args.max_steps,
            seed=args.seed,
            per_device_train_batch_size=args.rows,
            gradient_accumulation_steps=1,
            output_dir=str(Path(folder) / "run"),
            **given,
        )
        return dict(run.metrics)


def write_questions(path: Path, questions: list[str]) -> str:
    """Write a file with one question on each line, and return its path."""
    path.write_text("\n".join(questions) + "\n", encoding="utf-8")
    return str(path)


def write_spread_start(args: Any, P: int, folder: Path) -> Path:
    """Write an adapter of the embeddings of P tokens of the text, evenly spaced, and return its folder."""
    name = args.model_name_or_path
    ids = load_tokenizer(base_path(name))(read_distilled_text(args.text), add_special_tokens=False)["input_ids"]
    base = load_base(base_path(name), torch.device("cpu"), torch.float32)
    prompt = InputEmbeddings(base)[torch.tensor([ids[number * len(ids) // P] for number in range(P)])].float()
    write_folder(folder, adapter_files(Adapter(prompt, peft_config(name, base.config, prompt, "RANDOM"), {})))
    return folder


if __name__ == "__main__":
    main()
