"""The OpenAI-compatible server: HTTP over `AsyncLLM`. `app.make_app` is the ASGI application, `run.serve` a process."""
