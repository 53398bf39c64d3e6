"""Runs of Trainer + PEFT, and callbacks that record a run of our loop, for step-by-step comparison."""

from helpers.peers import peft_model, peft_prompt
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from softprompt.runs.state import Step


class Recorder:
    """Callbacks that record their calls."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.logs, self.evaluations, self.saves = [], [], []

    def on_step(self, step):
        self.steps.append(step)

    def on_log(self, metrics):
        self.logs.append(metrics)

    def on_evaluate(self, step):
        self.evaluations.append(step.number)

    def on_save(self, step, state):
        self.saves.append(step.number)

    def wants_to_stop(self):
        return False


def peer_run(base, tokenizer, values, rows, folder, **settings):
    """Train with Trainer + get_peft_model and the same arguments. Return the prompt [P, H] and the log history."""
    model = peft_model(base, values)
    args = TrainingArguments(
        output_dir=str(folder),
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    dataset = [{"input_ids": r.input_ids, "attention_mask": [1] * len(r.input_ids), "labels": r.labels} for r in rows]
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=collator)
    trainer.train()
    history = [record for record in trainer.state.log_history if "grad_norm" in record]
    return peft_prompt(model).detach(), history
