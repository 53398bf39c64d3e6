"""Says where `python -m softprompt.report` has gone."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: this command is now: python -m softprompt report …\n")
    sys.exit(2)
