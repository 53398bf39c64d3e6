"""Says where `python -m softprompt.study` has gone."""

import sys

if __name__ == "__main__":
    sys.stderr.write("error: this command is now: python -m softprompt study …\n")
    sys.exit(2)
