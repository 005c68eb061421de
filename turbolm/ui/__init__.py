"""The chat page: `turbolm ui`. Needs the extra `ui` (Gradio)."""
