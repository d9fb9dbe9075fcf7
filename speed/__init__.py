"""How fast: nothing in here changes a result, only the time and the memory it takes.

What each module does, plain code outside of this folder does as well, as the paper writes it. With
`capi.clustering_kernel: plain`, every option of `efficiency` off and moments in 32 bits, a training imports nothing of
it. Declared exceptions, both off by default, which move numbers a little: the teacher's 8-bit floats (`fp8.py`), and
images decoded on the GPU.
"""
