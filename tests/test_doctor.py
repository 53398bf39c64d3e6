"""`softprompt doctor`: what it finds on this machine, and what it advises where something is missing."""

import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

from softprompt import __main__, doctor


def advice_of(findings, name):
    return [finding.advice for finding in findings if finding.name == name]


def run_doctor(capsys, monkeypatch):
    """Exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["softprompt", "doctor"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    return ended.value.code, *capsys.readouterr()


def test_the_report_names_versions_device_and_memory(capsys, monkeypatch):
    code, out, err = run_doctor(capsys, monkeypatch)
    assert code == 0 and not err
    for fact in (version("torch"), version("transformers"), "--device", "GiB"):
        assert fact in out


def test_a_missing_optional_package_is_named_with_its_install_line(monkeypatch):
    known = doctor.version

    def without(name):
        if name == "bitsandbytes":
            raise doctor.PackageNotFoundError
        return known(name)

    monkeypatch.setattr(doctor, "version", without)
    findings = doctor.examine()
    (advice,) = advice_of(findings, "bitsandbytes")
    assert "pip install" in advice and "bitsandbytes" in advice
    assert not any(finding.advice and finding.required for finding in findings)
    assert advice in doctor.report(findings)


@pytest.mark.parametrize("found", ["2.3.0", None], ids=["old", "missing"])
def test_a_missing_or_old_torch_ends_the_examination_with_exit_code_2(found, monkeypatch, capsys):
    known = doctor.version

    def version_of(name):
        if name == "torch" and found is None:
            raise doctor.PackageNotFoundError
        return found if name == "torch" else known(name)

    monkeypatch.setattr(doctor, "version", version_of)
    code, out, err = run_doctor(capsys, monkeypatch)
    assert code == 2 and "pip install 'torch" in out and err.startswith("error: ")


def test_a_driver_without_a_cuda_build_is_noticed(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.NVIDIA_WHEELS in advice_of(doctor.hardware(), "cuda")


def test_gpus_are_described(monkeypatch):
    cards = [SimpleNamespace(name="H200", major=9, minor=0), SimpleNamespace(name="T4", major=7, minor=5)]
    cards.append(SimpleNamespace(name="K80", major=3, minor=7))
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 3,
        "get_device_properties": lambda index: cards[index],
        "mem_get_info": lambda index: ((100 << 30, 140 << 30), (2 << 30, 16 << 30), (1 << 30, 12 << 30))[index],
        "is_bf16_supported": lambda **_: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(doctor, "_failure_of", lambda index: "no kernel image" if index == 2 else None)
    findings = {finding.name: finding for finding in doctor.hardware()}
    assert "H200" in findings["cuda:0"].text and findings["cuda:0"].advice is None
    assert "fp16" in findings["cuda:1"].text and "nvidia-smi" in findings["cuda:1"].advice
    assert "no kernel image" in findings["cuda:2"].text and doctor.NVIDIA_WHEELS in findings["cuda:2"].advice
    assert "--device cuda, bfloat16" in findings["a run uses"].text


def test_a_folder_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "HF_HOME" in advice_of(doctor.folders(), "downloads")[0]


def test_a_home_that_is_a_file_is_noticed(monkeypatch, tmp_path):
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/.cache"))
    (advice,) = advice_of(doctor.folders(), "cache")
    assert "not a folder" in advice and "XDG_CACHE_HOME" in advice


def test_a_disk_that_is_nearly_full_is_noticed(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    findings = list(doctor.folders())
    assert len(findings) == 3 and all("full" in finding.advice for finding in findings)


def test_what_the_system_does_not_say_is_left_out(monkeypatch):
    monkeypatch.delattr(doctor.os, "cpu_count")
    findings = doctor.examine()
    assert any(finding.name == "hardware" and "cpu_count" in finding.text for finding in findings)
    assert not any(finding.advice and finding.required for finding in findings)


def test_a_torch_that_cannot_be_imported_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = doctor.examine()
    assert findings[-1].name == "torch" and findings[-1].required and "--force-reinstall" in findings[-1].advice


def test_an_environment_without_any_package_is_told_to_install(monkeypatch, capsys):
    for name in ("packaging", "packaging.requirements", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = run_doctor(capsys, monkeypatch)
    assert code == 2 and "pip install -e ." in out and err.startswith("error: ")
