"""Refuse `python -m softprompt.report`, and say its present name."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: python -m softprompt.report is now: python -m softprompt report …\n")
    sys.exit(2)
