"""Serve a base and its adapters over HTTP, with an OpenAI-compatible API: `softprompt serve`.

A request passes through `gate` (API key, shutdown, log), `app` (routes, size of the body), `bodies` (checks of the
fields), `encode` (messages → token ids), `model_thread` (the running batch) and `answer` (tokens → text, stop strings).
`formats` makes the response. `registry` finds and reads the adapter folders. FastAPI and uvicorn are needed only here
(the extra `serve`).
"""
