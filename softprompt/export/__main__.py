"""Refuse `python -m softprompt.export`, and say its present name."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: python -m softprompt.export is now: python -m softprompt export …\n")
    sys.exit(2)
