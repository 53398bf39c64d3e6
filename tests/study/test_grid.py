"""Study files: their cells, and all errors in them that are found before anything is loaded."""

import re
from pathlib import Path

import pytest

from softprompt.config.train_args import MLP_LEARNING_RATE, RANDOM_LEARNING_RATE
from softprompt.study.grid import read_study, relocated
from softprompt.study.results import group_by
from softprompt.utils.errors import ConfigError

HEAD = '[settings]\ndataset = "mini:sentiment"\nmax_steps = 2\n'


def study(tmp_path, text):
    path = tmp_path / "s.toml"
    path.write_text(text, encoding="utf-8-sig")  # with a byte order mark, as Windows editors write
    return read_study(path)


def test_a_grid_is_the_product_of_its_lists_and_grids_add_up_without_duplicates(tmp_path):
    grids = '[[grid]]\nnum_virtual_tokens = [1, 5]\nrows = [8, "all"]\n[[grid]]\nnum_virtual_tokens = [5, 9]\n'
    found = study(tmp_path, "seeds = [0, 1]\n" + HEAD + grids)
    told = [(c.config.prompt.num_virtual_tokens, c.rows, c.config.training.seed) for c in found.cells]
    assert told == [(P, rows, s) for P, rows in ((1, 8), (1, None), (5, 8), (5, None), (9, None)) for s in (0, 1)]
    assert found.output_dir.as_posix() == "runs/study-s"


def test_without_a_grid_there_is_one_cell(tmp_path):
    (cell,) = study(tmp_path, HEAD).cells
    assert cell.config.training.seed == 42 and cell.rows is None and cell.trained


def test_a_cell_says_how_many_virtual_tokens_a_text_gives(tmp_path):
    more = 'prompt_tuning_init_text = "看"\n[[grid]]\nprompt_tuning_init = ["TEXT", "RANDOM"]\n'
    of_text, random = map(str, study(tmp_path, HEAD + more).cells)
    assert "TEXT num_virtual_tokens auto (the length of the text)" in of_text and "num_virtual_tokens 10" in random


def test_a_cell_says_how_wide_its_encoder_is(tmp_path):
    grid = '[[grid]]\nprompt_reparameterization = "mlp"\nencoder_hidden_size = [8, 16]\n'
    narrow, wide = map(str, study(tmp_path, HEAD + grid).cells)
    assert "mlp encoder_hidden_size 8 " in narrow and "mlp encoder_hidden_size 16 " in wide


def test_the_default_learning_rate_given_explicitly_is_the_same_cell(tmp_path):
    found = study(tmp_path, HEAD + "[[grid]]\nlearning_rate = 0.3\n[[grid]]\n")
    assert [c.config.learning_rate() for c in found.cells] == [0.3]


def test_a_date_needs_no_quotes(tmp_path):
    (cell,) = study(tmp_path, HEAD + 'template = "chat"\nchat_template_date = 2026-01-31\n').cells
    assert cell.config.data.chat_template_date == "2026-01-31"


def test_settings_of_an_initialization_apply_to_its_cells_only(tmp_path):
    more = 'prompt_tuning_init_text = "看"\nclass_labels = "正面,负面"\nvocab_population = 50\n[[grid]]\n'
    found = study(tmp_path, HEAD + more + 'prompt_tuning_init = ["RANDOM", "SAMPLE_VOCAB", "TEXT", "CLASS_LABELS"]\n')
    prompts = [c.config.prompt for c in found.cells]
    assert [p.prompt_tuning_init_text for p in prompts] == [None, None, "看", None]
    assert [p.class_labels for p in prompts] == [None, None, None, "正面,负面"]
    assert [p.vocab_population for p in prompts] == [None, 50, None, 50]


def test_each_base_and_dataset_has_every_hard_prompt_once(tmp_path):
    grid = '[[grid]]\ndataset = ["mini:sentiment", "mini:domain"]\nlearning_rate = [0.01, 0.1]\nrows = [8, 9]\n'
    found = study(tmp_path, 'seeds = [0, 1]\nhard_prompts = ["看", "情感？"]\n' + HEAD + grid)
    hard = [c for c in found.cells if not c.trained]
    assert len(found.cells) - len(hard) == 2 * 2 * 2 * 2
    assert {(c.config.data.dataset, c.config.prompt.prompt_tuning_init_text) for c in hard} == {
        (data, text) for data in ("mini:sentiment", "mini:domain") for text in ("看", "情感？")
    }
    assert len(hard) == 4 and {c.rows for c in hard} == {None}


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed = [1]\n" + HEAD, "unknown key 'seed'; did you mean seeds?"),
        (HEAD + "learning_rat = 1\n", "settings: unknown key 'learning_rat'; did you mean learning_rate?"),
        (HEAD + "[[grid]]\nlearning_rats = [1]\n", "grid: unknown key 'learning_rats'; did you mean learning_rate?"),
        (HEAD + "[[grid]]\nxyzzy = [1]\n", "grid: unknown key 'xyzzy'; settings have train.py's names"),
        ("xyzzy = 1\n" + HEAD, "unknown key 'xyzzy'; the keys are title, about, output_dir, seeds"),
        (HEAD + 'output_dir = "x"\n', "settings: unknown key 'output_dir'; it belongs above [settings]"),
        (HEAD + "seed = 8\n", "settings: unknown key 'seed'; give a list of seeds above [settings]"),
        (HEAD + "rows = 8\n", "settings: unknown key 'rows'; it belongs under [[grid]]"),
        (
            HEAD + "stream_base = true\n",
            "settings: unknown key 'stream_base', which train.py has but a study does not",
        ),
        (HEAD + "[[grid]]\nload_in_4bit = [true]\n", "grid: unknown key 'load_in_4bit', which train.py has"),
        (HEAD + "learning_rate = [0.1]\n", "learning_rate has several values; a list belongs under [[grid]]"),
        (HEAD + "[grid]\nrows = [8]\n", "grid is not a list of tables; write [[grid]]"),
        ("settings = 3\n", "settings is not a table"),
        (HEAD + "[[grid]]\nrows = []\n", "grid: rows has no values"),
        (HEAD + "[[grid]]\nrows = [0]\n", "rows [0] are not integers of at least 1, or 'all'"),
        (HEAD + '[[grid]]\nrows = "al"\n', "rows 'al' are not integers"),
        ("seeds = []\n" + HEAD, "seeds [] is not a list of integers"),
        ("seeds = [-1]\n" + HEAD, "seeds [-1] is not a list"),
        ("seeds = [true]\n" + HEAD, "seeds [True] is not a list"),
        ("seeds = [9223372036854775808]\n" + HEAD, "is not a list of integers from 0 to 2**63 - 1"),
        (HEAD + '[[grid]]\npreset = "mini"\n', "grid: unknown key 'preset'; it belongs under [settings]"),
        (HEAD + "[settings.template]\na = 1\n", "--template {'a': 1} is not a text"),
        (HEAD + '[[grid]]\nprompt_tuning_init = [["TEXT"]]\n', "--prompt_tuning_init ['TEXT']"),
        (HEAD + "[[grid]]\nprompt_reparameterization = [{a = 1}]\n", "--prompt_reparameterization {'a': 1}"),
        (HEAD + '[[grid]]\nencoder_hidden_size = [8, "x"]\n', "no cell uses encoder_hidden_size, which is for mlp"),
        (HEAD + "encoder_hidden_size = -4\n", "no cell uses encoder_hidden_size, which is for mlp"),
        (HEAD + '[[grid]]\nclass_labels = ["a", "b"]\n', "no cell uses class_labels, which is for CLASS_LABELS"),
        ('hard_prompts = [""]\n' + HEAD, "hard_prompts [''] is not a list of texts"),
        ("output_dir = 3\n" + HEAD, "output_dir 3 is not a text"),
        (
            'voting = ["mean"]\nseeds = [1, 2]\n' + HEAD,
            "voting ['mean'] is not a list of majority_vote, mean_likelihood",
        ),
        ('voting = ["majority_vote"]\n' + HEAD, "voting needs several seeds, because"),
        ('voting = ["majority_vote"]\nseeds = [1, 1]\n' + HEAD, "voting needs several seeds, because"),
        ("voting = false\nseeds = [1, 2]\n" + HEAD, "voting False is not a list of majority_vote, mean_likelihood"),
        ('output_dir = "a\\u0000b"\n' + HEAD, "output_dir 'a\\x00b' is not a text"),
        (HEAD + 'class_labels = ["a", "b"]\n', "write the labels of one run as one text, 'one,another'"),
        ("seeds = [1\n", "not TOML"),
        ("seeds = " + "[" * 20_000, "not TOML"),
        (
            HEAD + "[[grid]]\nlearning_rate = [0.1, -1.0]\nrows = [8, 32]\n",
            "the cell learning_rate -1.0 rows 8 and 1 more: --learning_rate -1.0 must be above 0",
        ),
        (
            HEAD + '[[grid]]\nprompt_tuning_init = ["RANDOM", "TEXT"]\n',
            "the cell prompt_tuning_init TEXT: --prompt_tuning_init TEXT needs --prompt_tuning_init_text",
        ),
        (HEAD + "[[grid]]\nnum_virtual_tokens = [1, 2.5]\n", "--num_virtual_tokens 2.5 is not a whole number"),
        (
            HEAD
            + 'class_labels = "a,b,c"\nprompt_tuning_init = "CLASS_LABELS"\n[[grid]]\nnum_virtual_tokens = [2, 9]\n',
            "the cell num_virtual_tokens 2: --class_labels has 3 labels for 2 virtual tokens",
        ),
        ("[settings]\nmax_steps = -5\nmax_length = 1\n", "the cell of [settings]: --max_length 1 is too small"),
    ],
    ids=str,
)
def test_wrong_study_files_are_refused_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        study(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "s.toml")) and "\n" not in str(raised.value)


def test_the_shipped_study_varies_lengths_starts_rates_and_rows_and_matches_its_page():
    docs = Path(__file__).parents[2] / "docs"
    found = read_study(docs / "mini-study.toml")
    trained = [c.config for c in found.cells if c.trained]
    assert len({c.prompt.num_virtual_tokens for c in trained}) >= 3
    assert len({c.prompt.prompt_tuning_init for c in trained}) == 4
    assert {5e-5, RANDOM_LEARNING_RATE} < {c.learning_rate() for c in trained}
    assert {c.rows for c in found.cells} == {8, 32, 128, None}
    assert len({c.training.seed for c in trained}) >= 3 and len(trained) < len(found.cells)
    page = (docs / "study.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {found.title}\n\n{found.about.strip()}\n")


def test_the_study_of_real_bases_varies_one_task_like_the_other_and_matches_its_page():
    docs = Path(__file__).parents[2] / "docs"
    found = read_study(docs / "real-study.toml")
    page = (docs / "real-study.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {found.title}\n\n{found.about.strip()}\n")
    trained = [c for c in found.cells if c.trained]
    assert {c.training.seed for c in (cell.config for cell in trained)} == {42, 0, 1}
    by_task = group_by(trained, lambda c: (c.config.model.model_name_or_path, c.config.data.dataset))
    assert len(by_task) == 3 and len({base for base, _ in by_task}) == 2
    for (_, dataset), cells in by_task.items():
        prompts = [c.config.prompt for c in cells]
        starts = {"RANDOM", "SAMPLE_VOCAB", "TEXT"} | ({"CLASS_LABELS"} if "reviews" in dataset else set())
        assert {p.prompt_tuning_init for p in prompts} == starts
        assert {p.num_virtual_tokens for p in prompts} == {1, 10, 50}
        assert {c.rows for c in cells} == ({None} if "alpaca" in dataset else {32, 512, None})
        assert {3e-2, 1e-1, 3e-1} <= {c.config.learning_rate() for c in cells}


def test_the_rates_of_random_prompts_are_compared_on_seeds_of_their_own():
    docs = Path(__file__).parents[2] / "docs"
    found, other = read_study(docs / "random-rates.toml"), read_study(docs / "real-study.toml")
    seeds, seen = ({c.config.training.seed for c in study.cells if c.trained} for study in (found, other))
    assert len(seeds) == 3 and not seeds & seen
    by_task = group_by(found.cells, lambda c: c.config.data.dataset)
    assert by_task.keys() == {c.config.data.dataset for c in other.cells}
    assert all({c.config.learning_rate() for c in cells} == {1e-1, 3e-1} for cells in by_task.values())


def test_a_study_does_not_distill(tmp_path):
    with pytest.raises(ConfigError, match="does not support distillation"):
        study(tmp_path, '[settings]\npreset = "distill-mini"\n')


def test_a_missing_study_file(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: No such file.*; name a study file"):
        read_study(tmp_path / "none.toml")


def test_an_empty_output_dir_is_not_the_current_folder(tmp_path):
    with pytest.raises(ConfigError, match="--output_dir is empty; name a folder"):
        relocated(study(tmp_path, HEAD), "")


def test_the_command_of_a_relocated_study_has_its_output_dir(tmp_path):
    here = study(tmp_path, HEAD)
    assert here.arguments == (here.path.as_posix(),)
    assert relocated(here, "else where").arguments == (here.path.as_posix(), "--output_dir", "else where")


def test_a_reparameterization_is_an_axis_and_plain_cells_keep_the_names_of_earlier_versions(tmp_path):
    more = 'encoder_hidden_size = 16\n[[grid]]\nprompt_reparameterization = ["none", "mlp"]\n'
    plain, mlp = study(tmp_path, HEAD + more).cells
    assert [c.config.prompt.encoder_hidden_size for c in (plain, mlp)] == [None, 16]
    assert mlp.config.learning_rate() == MLP_LEARNING_RATE
    assert plain.settings().keys() == mlp.settings().keys() - {"prompt_reparameterization", "encoder_hidden_size"}
    assert str(plain) != str(mlp)
