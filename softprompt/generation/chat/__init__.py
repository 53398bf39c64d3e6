"""Chat in a terminal.

`loop` reads messages and displays answers; `messages` makes one message of the lines that are typed, and tells commands
from questions; `commands` runs a command on the `session`, which holds the settings and the turns of the chat and asks
the model. `terminal` reads lines with prompt_toolkit, readline or plain `input()`, and `history` keeps them for later
chats. Only `session` needs a model; only `terminal` needs a terminal.
"""
