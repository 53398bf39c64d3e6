"""Reject `python -m softprompt.study`, which has been renamed."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: python -m softprompt.study is now: python -m softprompt study …\n")
    sys.exit(2)
