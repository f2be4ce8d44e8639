"""The edits of a rewrite.

An edit is applied as soon as it is decided: the next decision sees what it has left.

- `ReplaceCall`: a call becomes a dual-path call.
- `Unshare`: calls inside a gate that is written out, which something else reads too, are made again for the gate.
- `CloseWritten`: the calls of a gate that is written out stay, and what they compute passes through a dual-path call.
- `Freeze`: an operand of a call becomes a constant.
- `OpenLeaf`: a leaf module's computation becomes a call on its tensors.
- `FreezeSoftmax`: the weights of attention that is written out become constants, and the values receive by tempered ones.
- `Surrogate`: a call stays, and its cotangent goes back through another one: a cosine similarity through one of constant norms.
- `Regroup`: a product stays, and its cotangent goes back through one of a gate and the other factors.
- `Compete`: a maximum of two signals becomes a maximum over both, which a max pooling is.
"""
