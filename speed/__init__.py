"""How fast: nothing in here changes a result, only the time and the memory it takes.

What each module does, plain code outside of this folder does as well, as the paper writes it. With
`capi.clustering_kernel: plain` and every option of `efficiency` off, a training imports nothing from here.
Declared exceptions, both off by default, which move numbers a little: the teacher's 8-bit floats (`fp8.py`), and images
decoded on the GPU.
"""
