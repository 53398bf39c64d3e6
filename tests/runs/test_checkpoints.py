"""A run's checkpoints: which are found, and which are removed."""

from softprompt.runs.checkpoints import checkpoints, step_of, surplus


def test_only_folders_count_as_checkpoints(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert [step_of(path) for path in checkpoints(tmp_path)] == [5, 10]


def test_which_checkpoints_are_kept():
    def kept(*arguments) -> list[int]:
        steps = [5, 10, 20, 100]
        return [step for step in steps if step not in surplus(steps, *arguments)]

    assert kept(100, None) == [5, 10, 20, 100]
    assert kept(100, 2) == [20, 100]
    assert kept(100, 2, 5) == [5, 100]
    assert kept(100, 1, 10) == [10, 100]  # as in Trainer, the best is kept beside the newest
    assert kept(100, 1, 100) == [100]
    assert kept(20, 2) == [10, 20]  # later ones are of a continuation that was abandoned
