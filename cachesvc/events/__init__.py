"""KV events: what is where, told to routers over ZMQ in vLLM's schema."""
