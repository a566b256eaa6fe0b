"""What an assistant does besides answering: tools that the model may call, timers that ring."""
