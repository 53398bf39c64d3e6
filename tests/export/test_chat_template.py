"""The chat template of an exported model: it writes what the training template writes, behind the virtual tokens."""

import pytest
from helpers.bases import make_tokenizer
from jinja2.exceptions import TemplateError

from softprompt.data.template import Template
from softprompt.export.chat_template import SAMPLES, add_prompt_tokens

QUESTIONS = ["我爱这部电影", "这家酒店太差了！ 1 < 2", "hello\n  world {x} {{ y }}"]
TEMPLATES = ["default", "Q: {instruction}\\nA: ", "{{fixed}} {{% x %}} 'a\\\\' \"{instruction}\"\\n{instruction}->"]


@pytest.mark.parametrize("spec", TEMPLATES)
@pytest.mark.parametrize("question", [*QUESTIONS, "", "  spaces  ", "'quotes' \"and\" \\n", "{{ messages }}{% if %}"])
def test_the_chat_template_equals_the_training_template(spec, question):
    tokenizer, template = make_tokenizer(), Template(spec)
    ids = add_prompt_tokens(tokenizer, template, 3)
    text = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    row = {"instruction": question, "input": ""}
    assert text == tokenizer.decode(ids) + template.render(row, tokenizer)


def test_other_columns_are_further_keys_of_a_message():
    tokenizer, template = make_tokenizer(), Template("{context}\nQ: {question} A: ")
    add_prompt_tokens(tokenizer, template, 1)
    message = {"role": "user", "content": "here", "question": "where?"}
    assert tokenizer.apply_chat_template([message], tokenize=False) == "<|softprompt_0|>here\nQ: where? A: "
    with pytest.raises(TemplateError, match="needs the text question besides the content"):
        tokenizer.apply_chat_template([{"role": "user", "content": "here"}], tokenize=False)
    default = make_tokenizer()
    add_prompt_tokens(default, Template(), 1)
    told = default.apply_chat_template([{"role": "user", "content": "a", "input": "b"}], tokenize=False)
    assert told == "<|softprompt_0|>" + Template().render({"instruction": "a", "input": "b"}, None)


def test_a_conversation_is_a_sequence_of_training_rows():
    tokenizer = make_tokenizer()
    add_prompt_tokens(tokenizer, Template("Q: {x}\nA: "), 2)
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    front = "<|softprompt_0|><|softprompt_1|>"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == front + "Q: a\nA: b</s>Q: c\nA: "
    begun = tokenizer.apply_chat_template(turns[:2], tokenize=False, continue_final_message=True)
    assert begun == front + "Q: a\nA: b"
    system = {"role": "system", "content": "be kind"}
    for wrong in ([system, *turns], turns[:1] * 2, turns[1:]):
        with pytest.raises(TemplateError, match="roles must alternate"):
            tokenizer.apply_chat_template(wrong, tokenize=False)
    with pytest.raises(TemplateError, match="content of a message must be a text"):
        tokenizer.apply_chat_template([{"role": "user", "content": None}], tokenize=False)


@pytest.mark.parametrize(
    "own",
    [
        "  {% for m in messages %}\n  {{ m.role }}: {{ m.content }}\n  {% endfor %}\n"
        "{% if add_generation_prompt %}bot:{% endif %}",
        "\n  hello {% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ bos_token }}{%- for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>\n{% endfor %}",
    ],
)
def test_the_base_s_chat_template_follows_the_virtual_tokens(own):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": " hi "}]
    plain, tokenizer = make_tokenizer(), make_tokenizer()
    plain.chat_template = tokenizer.chat_template = own
    add_prompt_tokens(tokenizer, Template("chat"), 2)
    for generation in (False, True):
        expected = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        found = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        assert found == "<|softprompt_0|><|softprompt_1|>" + expected


def test_special_tokens_of_the_tokenizer_are_placed_as_in_training():
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids = add_prompt_tokens(tokenizer, Template(), 2)
    found = tokenizer.apply_chat_template([{"role": "user", "content": SAMPLES[0]}], return_dict=False)
    whole = tokenizer(Template().render({"instruction": SAMPLES[0]}, None))["input_ids"]
    assert whole[0] == 1 and whole[-1] == 2
    assert found == ids + whole[:-1]
