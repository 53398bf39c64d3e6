"""Ask a frozen language model with a learned prompt: `python infer.py --prompt "…"`; see `python infer.py --help`."""

import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict

from softprompt.cli import command, parse_inference


def main(argv: Sequence[str]) -> None:
    config = parse_inference(argv)

    from softprompt.api import SoftPromptModel  # after parsing: a wrong flag need not wait for torch
    from softprompt.rows import load_prompts

    where, question = config.model, config.question
    model = SoftPromptModel.from_pretrained(
        where.model_name_or_path, where.adapter, device=where.device, bf16=where.bf16, fp16=where.fp16
    )
    settings = asdict(config.generation)
    if settings["seed"] is None:
        settings["seed"] = secrets.randbits(31)  # torch alone starts every process with the same seed
    if question.prompts_file is not None:
        rows = load_prompts(question.prompts_file, model.template)
    else:
        rows = [model.template.row(question.prompt or "", question.input or "")]
    answers = model.stream(rows, **settings)
    print(model.description, file=sys.stderr)
    for row, text in zip(rows, answers, strict=True):
        many = question.prompts_file is not None
        print(json.dumps({**row, "text": text}, ensure_ascii=False) if many else text, flush=True)


if __name__ == "__main__":
    command(main)
