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
    print(model.description, file=sys.stderr)
    settings = asdict(config.generation)
    if settings["seed"] is None:
        settings["seed"] = secrets.randbits(31)  # torch alone starts every process with the same seed
    if question.prompt is not None:
        print(model.generate(model.template.row(question.prompt, question.input or ""), **settings))
        return
    rows = load_prompts(question.prompts_file or "", model.template)
    for row, text in zip(rows, model.stream(rows, **settings), strict=True):
        print(json.dumps({**row, "text": text}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    command(main)
