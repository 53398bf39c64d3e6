"""Refuse `python -m softprompt.export`, and name the command that replaces it."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: python -m softprompt.export has been replaced by: python -m softprompt export …\n")
    sys.exit(2)
