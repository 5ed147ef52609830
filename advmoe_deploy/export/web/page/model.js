// The model in ONNX Runtime Web, and the files beside this page.
import * as ort from "./ort/ort.wasm.bundle.min.js";

const at = (name) => new URL(name, import.meta.url).href;

// Threads share memory, which browsers allow to isolated pages only (headers COOP and COEP).
export const threads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
ort.env.wasm.numThreads = threads;
ort.env.wasm.wasmPaths = {wasm: at("ort/ort-wasm-simd-threaded.wasm")};

export const runtime = ort.env.versions.web;

async function read(name) {
  const response = await fetch(at(name));
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

export const readJson = async (name) => (await read(name)).json();
export const readFloats = async (name) => new Float32Array(await (await read(name)).arrayBuffer());

export function softmax(scores) {
  const most = Math.max(...scores), powers = Array.from(scores, (score) => Math.exp(score - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / sum);
}

export const best = (values) => values.indexOf(Math.max(...values));

// By how much the best expert's share exceeds the second's; of many tokens there is no one margin.
function marginOf(scores) {
  if (!scores || scores.dims[0] !== 1 || scores.dims[1] < 2) return null;
  const [first, second] = softmax(scores.data).sort((a, b) => b - a);
  return first - second;
}

export class Model {
  static async load(file) {
    const options = {executionProviders: ["wasm"]};
    return new Model(await ort.InferenceSession.create(at(file), options));
  }

  constructor(session) {
    this.session = session;
  }

  run(pixels, shape) {
    return this.session.run({images: new ort.Tensor("float32", pixels, [1, ...shape])});
  }

  // Logits, and of each layer of `site.routes` the experts chosen (for each token) and the margin.
  async answer(pixels, site) {
    const outputs = await this.run(pixels, site.shape);
    const routes = site.routes.map(({layer, scores}) => ({
      layer,
      ids: Array.from(outputs[`${layer}.expert_ids`].data, Number),
      margin: marginOf(scores && outputs[scores]),
    }));
    return {logits: Array.from(outputs.logits.data), routes};
  }
}
