"""Making the embedded base."""

from softprompt.mini import make
from softprompt.utils.errors import OutputError


def test_an_output_folder_that_is_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "mine").touch()
    assert make.main(["--output_dir", str(tmp_path)]) == OutputError.exit_code
    assert f"--output_dir {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
