// A streamed answer with Go's standard library: go run examples/chat.go. Start the server first: turbolm serve
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"log"
	"net/http"
	"os"
	"strings"
)

type chunk struct {
	Choices []struct {
		Delta struct {
			Content string `json:"content"`
		} `json:"delta"`
	} `json:"choices"`
	Error *struct {
		Message string `json:"message"`
	} `json:"error"`
}

func main() {
	url := os.Getenv("TURBOLM_URL")
	if url == "" {
		url = "http://127.0.0.1:23333"
	}
	body := `{"messages": [{"role": "user", "content": "Why is the sky blue?"}], "max_tokens": 100, "stream": true}`
	response, err := http.Post(url+"/v1/chat/completions", "application/json", strings.NewReader(body))
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		var refusal chunk
		if err := json.NewDecoder(response.Body).Decode(&refusal); err != nil || refusal.Error == nil {
			log.Fatal(response.Status)
		}
		log.Fatal(refusal.Error.Message)
	}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, 1<<20) // a line is an event, which may hold many tokens
	for lines.Scan() {
		data := strings.TrimPrefix(lines.Text(), "data: ")
		if data == lines.Text() || data == "[DONE]" {
			continue
		}
		var event chunk
		if err := json.Unmarshal([]byte(data), &event); err != nil {
			log.Fatal(err)
		}
		if event.Error != nil {
			log.Fatal(event.Error.Message)
		}
		if len(event.Choices) > 0 {
			fmt.Print(event.Choices[0].Delta.Content)
		}
	}
	if err := lines.Err(); err != nil {
		log.Fatal(err)
	}
	fmt.Println()
}
