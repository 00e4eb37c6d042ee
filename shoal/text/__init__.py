"""Text to tokens and back: tokenizer, chat templates, incremental detokenizer. It must not know about tensors or jobs."""
