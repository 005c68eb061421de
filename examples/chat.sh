#!/bin/sh
# A streamed answer with curl. Start the server first: turbolm serve
curl -sSN "${TURBOLM_URL:-http://127.0.0.1:23333}/v1/chat/completions" \
    -H 'Content-Type: application/json' \
    -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 100, "stream": true}'
