"""The code of a model card. It runs as it is: in the adapter's folder or, if the adapter was published, anywhere."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from softprompt.data.template import CHAT, Template

HERE = "."


class CardBase(NamedTuple):
    """The base as a card names it: a hub id, the base `mini` of this package, or the last component of a local path."""

    name: str
    kind: Literal["hub", "mini", "local"]


def softprompt_code(base: CardBase, template: Template, repository: str | None) -> list[str]:
    """Return Markdown lines with code that asks a question with this package.

    Args:
        template: The template of the prompt.
        repository: The repository of the published adapter; None if the card is in the adapter's folder.
    """
    imports, folder = ["from softprompt import SoftPromptModel"], repr(HERE)
    if repository:
        imports = ["from huggingface_hub import snapshot_download", *imports]
        folder = f"snapshot_download({repository!r})"
    is_named = bool(repository) and base.kind == "local"  # the published adapter_config.json does not name it
    model = f"SoftPromptModel.from_pretrained({f'{base.name!r}, ' if is_named else 'adapter='}{folder})"
    asked = {name: "…" for name in _columns(template) if name not in template.optional_fields}
    question = repr(asked if len(asked) > 1 else "…")
    return _block([*imports, "", f"model = {model}", f"print(model.generate({question}))"])


def peft_code(base: CardBase, template: Template, repository: str | None) -> list[str]:
    """Return Markdown lines with code that does the same with PEFT; for the arguments see `softprompt_code`."""
    imports, where, named = ["from peft import PeftModel"], repr(repository or HERE), f"base = {base.name!r}"
    if base.kind == "mini":
        imports, named = [*imports, "from softprompt.mini import BASE_DIR"], "base = str(BASE_DIR)"
    elif base.kind == "local" and not repository:
        imports = ["from peft import PeftConfig, PeftModel"]
        named = f"base = PeftConfig.from_pretrained({where}).base_model_name_or_path"
    return _block(
        [
            *imports,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            named,
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), {where})",
            f"inputs = {_inputs(template)}",
            "# use_cache=False: with peft 0.21 and transformers 5, cached answers differ and are wrong",
            "answer = model.generate(**inputs, max_new_tokens=64, use_cache=False)[0, inputs.input_ids.shape[1] :]",
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
    )


def _inputs(template: Template) -> str:
    """Return an expression for the token ids of a question in the template, whose texts are "…"."""
    if template.spec == CHAT:
        said = "[{'role': 'user', 'content': '…'}]"
        more = "add_generation_prompt=True, return_dict=True, return_tensors='pt'"
        return f"tokenizer.apply_chat_template({said}, {more})"
    row = {name: "" if name in template.optional_fields else "…" for name in _columns(template)}
    return f"tokenizer({template.render(row, None)!r}, return_tensors='pt')"


def _columns(template: Template) -> Sequence[str]:
    return template.fields or ("instruction",)


def _block(lines: Sequence[str]) -> list[str]:
    return ["```python", *lines, "```", ""]
