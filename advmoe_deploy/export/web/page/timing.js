// Models timed in turns: each round has a block of runs of each, in another order.

const BLOCK_MS = 20;  // browsers round their clocks, so a block is long

const rest = () => new Promise((done) => setTimeout(done));  // the browser draws meanwhile

async function block(model, pixels, shape, runs) {
  const began = performance.now();
  for (let i = 0; i < runs; i++) await model.run(pixels, shape);
  return (performance.now() - began) / runs;
}

export function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b), place = share * (sorted.length - 1);
  const low = Math.floor(place), high = Math.ceil(place);
  return sorted[low] + (place - low) * (sorted[high] - sorted[low]);
}

function shuffled(items) {
  const order = [...items];
  for (let i = order.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

// Times in ms of `models`, a Map by name, over `rounds`; `images(round)` gives a round's pixels.
export async function timed(models, images, shape, rounds, tell = () => {}) {
  const runs = new Map(), times = new Map();
  for (const [name, model] of models) {
    await block(model, images(0), shape, 2);  // the first runs prepare memory
    const one = Math.min(await block(model, images(0), shape, 1), await block(model, images(0), shape, 3));
    runs.set(name, Math.max(1, Math.min(1000, Math.ceil(BLOCK_MS / Math.max(one, 0.01)))));
    times.set(name, []);
    await rest();
  }
  for (let round = 0; round < rounds; round++) {
    for (const [name, model] of shuffled(models)) {
      times.get(name).push(await block(model, images(round), shape, runs.get(name)));
    }
    tell(round + 1);
    await rest();
  }
  return Object.fromEntries([...times].map(([name, values]) => [name, {
    n: values.length,
    runs: runs.get(name),
    median_ms: quantile(values, 0.5),
    p10_ms: quantile(values, 0.1),
    p90_ms: quantile(values, 0.9),
    all_ms: values,
  }]));
}
