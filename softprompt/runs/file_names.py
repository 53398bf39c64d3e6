"""Names of the files in a run's folder and in its checkpoints."""

from softprompt.prompt.file_names import CARD_FILE, CONFIG_FILE, SETTINGS_FILE, WEIGHTS_FILE

REPORT_FILE, PICTURE_FILE = "report.html", "loss.png"
MARK = '<meta name="generator" content="softprompt.report">'  # identifies a page as a report
RESULTS_FILE = "all_results.json"
QUESTION_FILE = "question.jsonl"  # a question to try with the prompt, if flags cannot express it
ANSWERS_FILE = "teacher_answers.jsonl"  # only with distillation: see training.teacher_answers
FACTS_FILE, START_FILE = "report.json", "prompt_start.safetensors"  # see report.collect
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng_state.safetensors"
METRICS_FILE = "metrics.jsonl"
CHECKSUMS_FILE = "checksums.json"
STATE_FILES = (OPTIMIZER_FILE, RNG_FILE, STATE_FILE)
ENCODER_FILE = "prompt_encoder.safetensors"  # only with --prompt_reparameterization
OF_A_CHECKPOINT = {WEIGHTS_FILE, CONFIG_FILE, SETTINGS_FILE, CARD_FILE, METRICS_FILE, *STATE_FILES}
