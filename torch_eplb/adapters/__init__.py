"""Our policies behind the interfaces of other engines' balancers.

``planning`` is what they share; ``vllm``, ``sglang`` and ``vllm_ascend`` are the engines. To try a
policy in a server, start it with ``TORCH_EPLB_POLICY=flow`` set (``plugin``), or call the engine's
``install()`` in its processes.

Importing any of them imports numpy only; the engine and torch are imported when they are needed.
"""
