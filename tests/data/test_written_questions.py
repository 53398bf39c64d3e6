"""What a base is asked when it writes questions about a document, and which questions its answers hold."""

import pytest
from helpers.distillation import CHAT

from softprompt.data.questions import text_ids
from softprompt.data.template import Template
from softprompt.data.written_questions import questions_about, written_questions
from softprompt.models.loading import load_tokenizer


@pytest.mark.parametrize(
    ("answers", "questions"),
    [
        (
            ["What is it?\nAnd more", '"What is it?"', "  \n", "Question: Where?", "“在哪里？”"],
            ["What is it?", "Where?", "在哪里？"],
        ),
        (['Question: "What?"', '"Question: When?"', "**Question:** *How?*  "], ["What?", "When?", "How?"]),
        (
            ['What is "it"', '"Where is “it”"', 'Who?"', "谁？”*", "'"],
            ['What is "it"', "Where is “it”", "Who?", "谁？"],
        ),
        (
            ["1. Question: Why?", "2) Q: When?", "3、问题：多少？", "问：多久？", "1.5 m?", "Here it is:", "如下："],
            ["Why?", "When?", "多少？", "多久？", "1.5 m?"],
        ),
        (
            ["1. **Question:** What?", "4、 问题：谁？", 'Question 1: "How?"', "**Q2:** Which?", "2 of 3?", "Q"],
            ["What?", "谁？", "How?", "Which?", "2 of 3?", "Q"],
        ),
        (
            [
                "“软提示”是什么？",
                "“甲”和“乙”有何不同？",
                '1. "Soft" means what?',
                "*This* is what?",
                "'tis what?",
                "**A?**",
            ],
            ["“软提示”是什么？", "“甲”和“乙”有何不同？", '"Soft" means what?', "*This* is what?", "'tis what?", "A?"],
        ),
        (
            [
                "1.Why?",
                "Q1. When?",
                "Question: 1. Where?",
                "- How?",
                "（1）谁？",
                "问题一：几点？",
                "「哪里？」",
                "‘What?’",
            ],
            ["Why?", "When?", "Where?", "How?", "谁？", "几点？", "哪里？", "What?"],
        ),
        ([], []),
    ],
)
def test_a_question_is_the_first_line_of_an_answer(answers, questions, tokenizer):
    ids = [tokenizer(answer)["input_ids"] for answer in answers]
    assert written_questions(ids, tokenizer) == questions


@pytest.mark.parametrize(
    ("template", "marks"), [("{instruction}", ("question about", "一个问题")), ("chat", ("Write", "请写"))]
)
def test_a_document_is_asked_about_in_its_language(template, marks, tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.chat_template = CHAT
    texts = "The rooms of this hotel have a view of the sea.", "这家酒店的每个房间都能看到大海。"
    for text, mark, other in zip(texts, marks, reversed(marks), strict=True):
        ((*ids,),) = questions_about(text, text_ids(text, tokenizer), tokenizer, Template(template), 5)
        asked = tokenizer.decode(ids)
        assert mark in asked and other not in asked and text in asked


def test_passages_are_taken_from_the_whole_text(tokenizer):
    text, template = "。".join(f"第{number}段" for number in range(600)), Template("{instruction}")
    every, some = (questions_about(text, text_ids(text, tokenizer), tokenizer, template, most) for most in (1000, 3))
    assert len(every) > 6 and len(some) == 3 and some[0] == every[0]
    assert every.index(some[1]) == len(every) // 3 and every.index(some[2]) == 2 * len(every) // 3
