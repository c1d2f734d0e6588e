"""The llama.cpp family: llama.cpp, ik_llama.cpp and ollama share one arithmetic of buffers."""
