"""JAX and Flax: your own loop records history and weights, then its checkpoints' predictions are fused.

pip install "fmn_ref[demo]" flax optax
python docs/examples/flax_loop.py runs/flax
"""

import sys
from pathlib import Path

import jax
import optax
from flax import nnx, serialization
from sklearn.datasets import load_digits

import fmn_ref as fmn

EPOCHS = 30


class Net(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.hidden, self.out = nnx.Linear(64, 256, rngs=rngs), nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.relu(self.hidden(x)))


@nnx.jit
def train_step(net: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
    def loss(net: Net) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

    optimizer.update(net, nnx.grad(loss)(net))


def main(run_dir: str) -> None:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    x_train, x_val, x_test = x[:800], x[800:1100], x[1100:]
    y_val, y_test = y[800:1100], y[1100:]
    y_train = fmn.symmetric_noise(y[:800], 0.4, 10, seed=0)

    net = Net(seed=0)
    optimizer = nnx.Optimizer(net, optax.adam(1e-2), wrt=nnx.Param)

    def save(path: Path) -> None:
        path.write_bytes(serialization.to_bytes(nnx.to_pure_dict(nnx.state((net, optimizer)))))

    def load(path: Path) -> None:
        state = nnx.to_pure_dict(nnx.state((net, optimizer)))
        nnx.update((net, optimizer), serialization.from_bytes(state, path.read_bytes()))

    recorder = fmn.Recorder(run_dir, save=save, suffix=".msgpack")
    if recorder.next_epoch:  # interrupted: continue from the last epoch
        load(recorder.run.checkpoints[-1])
    for epoch in range(recorder.next_epoch, EPOCHS):
        key = jax.random.key(epoch)
        for order in jax.random.permutation(key, 800).reshape(-1, 50):
            train_step(net, optimizer, x_train[order], y_train[order])
        recorder.record(epoch, net(x_val), y_val)  # arrays of JAX

    def predict(path: Path, x: jax.Array) -> jax.Array:
        load(path)
        return nnx.softmax(net(x))

    run = recorder.run
    plan = fmn.fuse([predict(path, x_val) for path in run.checkpoints], y_val, correct=run.history, method="auto")
    test = [predict(path, x_test) for path in run.checkpoints]
    final, fused = (100 * fmn.correctness(p, y_test).mean() for p in (test[-1], plan.apply(test)))
    print(f"peak F_e {recorder.peak_forget_fraction:.3f}; test accuracy: final {final:.1f} %, fused {fused:.1f} %")


if __name__ == "__main__":
    main(sys.argv[1])
