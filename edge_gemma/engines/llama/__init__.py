"""llama.cpp: its library, decoder, samplers, grammars and weights. The only package that imports
llama_cpp.
"""
