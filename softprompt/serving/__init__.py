"""Serve a base and its adapters over HTTP, through the API of OpenAI: `softprompt serve`.

A request passes through `gate` (limits, key, log), `app` (routes), `bodies` (checks), `encode` (messages → token ids),
`model_thread` (the running batch) and `answer` (tokens → text, stop strings), and is written by `formats`. `registry`
knows the adapter folders. FastAPI and uvicorn are needed only here (the extra `serve`).
"""
