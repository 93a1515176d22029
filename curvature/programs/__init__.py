"""Reading a function as a program (a jaxpr): the only package that knows primitives.

In the order in which a function is read:

1. ``_traced``: a function is traced once. ``_jaxprs`` inlines its calls; ``_primitives`` says what holds for each name.
2. ``_legality``: which equation forbids forward or reverse mode.
3. ``_batch_axis``, ``_mean_structure``: whether the function is a sum or mean over examples of its data.
4. ``_affine``, ``_views``, ``_taps``: the equations where the parameters of one example's loss meet its data.
5. ``_tap_gradients``: the gradients from the inputs and cotangents at these equations; ``transforms._tap_hessian``
   assembles the Hessian of the mean from their derivatives.

Beside this path: ``_pushforward`` and ``_jets`` for directional derivatives and Laplacians, ``_finiteness`` for the
proof that a program keeps values and derivatives finite.
"""
