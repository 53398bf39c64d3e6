"""Reads exported folders with transformers alone: a process of its own, in which softprompt cannot be imported.

    python plain_reader.py JOBS.json RESULTS.pt

A job is a folder and its questions; its result holds, per question, the ids that the chat template gives, their
logits [T, V], greedy answers with and without suppress_tokens, and what `pipeline` says to messages and to strings.
"""

import json
import sys

sys.modules["softprompt"] = None  # type: ignore[assignment]  # importing it is an ImportError now

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402


@torch.no_grad()
def read(folder: str, questions: list[str], new_tokens: int) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    greedy = {"do_sample": False, "max_new_tokens": new_tokens}
    result = {"dtype": str(model.dtype), "tied": model.config.tie_word_embeddings, "rows": []}
    for question in questions:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        guarded = model.generate(**ids, **greedy)[0]
        sequence = ids["input_ids"][0]  # plain argmax, with nothing but the model's own logits
        for _ in range(new_tokens):
            sequence = torch.cat([sequence, model(sequence[None]).logits[0, -1].argmax()[None]])
            if sequence[-1] == tokenizer.eos_token_id:
                break
        start = ids["input_ids"].shape[1]
        said = ask(messages, return_full_text=False, **greedy)[0]["generated_text"]
        result["rows"].append(
            {
                "text": text,
                "ids": ids["input_ids"][0].tolist(),
                "string_ids": tokenizer(text)["input_ids"],
                "shown": tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True),
                "logits": model(**ids).logits[0],
                "answer": tokenizer.decode(guarded[start:], skip_special_tokens=True),
                "unguarded": tokenizer.decode(sequence[start:], skip_special_tokens=True),
                "pipeline_messages": said,
                "pipeline_string": ask(text, return_full_text=False, **greedy)[0]["generated_text"],
            }
        )
    padded = ask([row["text"] for row in result["rows"]], batch_size=len(questions), return_full_text=False, **greedy)
    result["batch"] = [answers[0]["generated_text"] for answers in padded]
    return result


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    torch.save([read(**job) for job in jobs], sys.argv[2])
