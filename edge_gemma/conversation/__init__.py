"""Spans → tokens → text: one KV cache, sessions in spans, chats in turns, speech while it is
spoken.
"""
