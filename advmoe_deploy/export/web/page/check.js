// The check of ?check: every sample's answer against the native one, and the time of each network.
import {best, readJson, runtime, threads} from "./model.js";
import {timed} from "./timing.js";

const same = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);

async function differences(site, model, samples) {
  const expected = await readJson("expected.json");
  const found = {
    samples: samples.count, compared: 0, not_finite: 0, largest_difference: 0,
    other_classes: 0, other_routes: 0, margin_of_other_routes: 0,
  };
  for (let i = 0; i < samples.count; i++) {
    const answer = await model.answer(samples.at(i), site);
    const other = answer.routes.filter(({layer, ids}) => !same(ids, expected.expert_ids[layer][i]));
    if (other.length) {  // another expert answers otherwise: no rounding, but a route that was close
      found.other_routes += 1;
      found.margin_of_other_routes = Math.max(found.margin_of_other_routes, other[0].margin ?? 1);
      continue;
    }
    const apart = answer.logits.map((logit, k) => Math.abs(logit - expected.logits[i][k]));
    if (!apart.every(Number.isFinite)) {
      found.not_finite += 1;
      continue;
    }
    found.compared += 1;
    found.largest_difference = Math.max(found.largest_difference, ...apart);
    found.other_classes += best(answer.logits) !== best(expected.logits[i]);
  }
  return found;
}

export async function check(site, models, samples, rounds) {
  const [model] = models.values();
  return {
    ...await differences(site, model, samples),
    times: await timed(models, samples.clean, site.shape, rounds),
    threads,
    onnxruntime_web: runtime,
    browser: navigator.userAgent,
  };
}
