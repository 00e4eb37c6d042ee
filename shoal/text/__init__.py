"""Text to tokens and back: tokenizer, chat templates, detokenizer. It must not know about tensors or jobs."""
