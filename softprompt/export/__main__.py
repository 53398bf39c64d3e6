"""Says where `python -m softprompt.export` has gone."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: this command is now: python -m softprompt export …\n")
    sys.exit(2)
