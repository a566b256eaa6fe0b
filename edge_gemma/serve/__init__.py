"""The same model for programs that are not Python: a queue (service.py), and the protocols of
OpenAI and Ollama over HTTP (http.py). Only the command line and those who embed it import this.
"""
