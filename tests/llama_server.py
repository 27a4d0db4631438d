"""llama.cpp's own server, from the wheel `xllamacpp`: python llama_server.py MODEL.gguf THREADS SLOTS CONTEXT

Prints its address on a line of its own, and serves until its standard input is closed.
"""

import sys

import xllamacpp

model, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:5])
params = xllamacpp.CommonParams()
params.model.path = model
params.port = 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.n_parallel = slots
params.n_ctx = context
params.kv_unified = True
params.use_jinja = True
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
