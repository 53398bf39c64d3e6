"""Refuse `python -m softprompt.study`, and say its present name."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: python -m softprompt.study is now: python -m softprompt study …\n")
    sys.exit(2)
