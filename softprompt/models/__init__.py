"""The frozen base: loading, precision, quantization, sharding and weight offloading.

In: a folder or hub id. Out: a frozen transformers model, or a provider of BLOOM's weights block by block.
"""
