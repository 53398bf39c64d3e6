"""Reject `python -m softprompt.report`, which has been renamed."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: python -m softprompt.report is now: python -m softprompt report …\n")
    sys.exit(2)
