"""The rows of the tests' studies, and a stand-in that counts the calls of a function."""

ROWS = [
    {"instruction": f"{word}，{n}", "input": "", "output": word} for n in range(6) for word in ("好", "坏 bad", "hm")
]


class Counted:
    """Replaces a function of a module and counts its calls."""

    def __init__(self, monkeypatch, module, name):
        self.calls, self.real = 0, getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.real(*args, **kwargs)
