// The page: an image, an attack, and what the model makes of it.
// Names of classes and layers are a stranger's: they are set as text, never as HTML.
import {check} from "./check.js";
import {Model, best, readFloats, readJson, runtime, softmax, threads} from "./model.js";
import {timed} from "./timing.js";

const ROUNDS = 40, FEW = 10;
const at = (id) => document.getElementById(id);
const percent = (share) => `${(100 * share).toFixed(1)} %`;
const ms = (time) => time.toPrecision(3);

function counted(macs) {
  const [size, unit] = [[1e9, "G"], [1e6, "M"], [1e3, "K"]].find(([size]) => macs >= size) || [1, ""];
  return `${Number((macs / size).toPrecision(3))} ${unit}`;
}

function make(tag, kind = "", text = "") {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  return element;
}

// The samples: `at(i)` the pixels of image and attack i, `clean(i)` of image i without one.
function samplesOf(floats, {shape, labels, epsilons}) {
  const size = shape.reduce((a, b) => a * b), attacks = epsilons.length;
  const pixels = (i) => floats.subarray(i * size, (i + 1) * size);
  return {
    count: labels.length * attacks,
    at: pixels,
    clean: (image) => pixels((image % labels.length) * attacks),
    of: (image, attack) => pixels(image * attacks + attack),
  };
}

// Draw channels-first values, grey or colour, that `tone` maps to 0 to 1.
function draw(canvas, values, [channels, height, width], tone = (value) => value) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), picture = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) {
      const from = channels === 3 ? c : 0;
      picture.data[4 * i + c] = 255 * tone(values[from * width * height + i]);
    }
    picture.data[4 * i + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function showClasses(names, shares) {
  const order = [...shares.keys()], winner = best(shares);
  if (order.length > FEW) order.sort((a, b) => shares[b] - shares[a]).splice(FEW);
  at("classes").replaceChildren(...order.map((k) => {
    const row = make("div", k === winner ? "share best" : "share"), bar = make("div", "bar");
    const filled = make("i"), name = make("span", "", names[k]);
    filled.style.setProperty("--share", shares[k]);
    name.title = names[k];
    bar.append(filled);
    row.append(name, bar, make("span", "number", percent(shares[k])));
    return row;
  }));
}

function chips(experts, ids, before) {
  return experts.map((id) => {
    const kind = ids.includes(id) ? " chosen" : before.includes(id) ? " before" : "";
    return make("span", `expert${kind}`, String(id));
  });
}

function counts(ids) {
  const found = new Map();
  for (const id of ids) found.set(id, (found.get(id) || 0) + 1);
  const parts = [...found].sort(([a], [b]) => a - b).map(([id, count]) => `${id} (${count})`);
  return [make("span", "", `experts of ${ids.length} choices: ${parts.join(", ")}`)];
}

function showExperts(site, answer, clean) {
  at("experts").replaceChildren(...site.routes.map((route, r) => {
    const {layer, ids, margin} = answer.routes[r], row = make("div", "layer");
    const few = !route.tokens && route.experts.length <= 16;
    if (site.routes.length > 1) row.append(make("span", "quiet", layer));
    row.append(...(few ? chips(route.experts, ids, clean.routes[r].ids) : counts(ids)));
    if (margin !== null) row.append(make("span", "quiet", `margin ${margin.toFixed(3)}`));
    return row;
  }));
}

const routesOf = (answer) => JSON.stringify(answer.routes.map(({ids}) => ids));

function showVerdict(site, image, attack, answer, clean) {
  const [now, was] = [answer, clean].map(({logits}) => best(logits)), label = site.labels[image];
  const badges = [];
  if (now !== label) badges.push(make("span", "badge bad", `wrong: it is ${site.classes[label]}`));
  else badges.push(make("span", "badge good", "right"));
  if (attack && now !== was) badges.push(make("span", "badge bad", "class changed by the attack"));
  if (attack && site.routes.length) {
    const moved = routesOf(answer) !== routesOf(clean);
    badges.push(make("span", `badge ${moved ? "bad" : "good"}`, moved ? "expert changed by the attack" : "expert as before"));
  }
  at("verdict").replaceChildren(...badges);
  at("label").textContent = site.classes[now];
}

function strengthOf(site, attack) {
  if (!attack) return "none";
  const epsilon = 255 * site.epsilons[attack];
  return `every pixel by at most ${epsilon.toFixed(epsilon < 10 ? 1 : 0)} of 255`;
}

class Page {
  constructor(site, samples, model) {
    Object.assign(this, {site, samples, model, image: 0, attack: 0, asked: 0});
    this.buildStrip();
    at("level").max = site.epsilons.length - 1;
    at("level").oninput = () => this.choose(this.image, Number(at("level").value));
    at("experts-title").hidden = !site.routes.length;
    at("how").textContent = `Found by ${site.attack}, on the model in PyTorch; here its export answers.`;
  }

  buildStrip() {
    at("strip").replaceChildren(...this.site.labels.map((label, image) => {
      const button = make("button"), canvas = make("canvas");
      button.type = "button";
      button.setAttribute("aria-label", `image ${image + 1}: ${this.site.classes[label]}`);
      draw(canvas, this.samples.clean(image), this.site.shape);
      button.append(canvas);
      button.onclick = () => this.choose(image, this.attack);
      return button;
    }));
  }

  choose(image, attack) {
    this.show(image, attack).catch(complain);
  }

  async show(image, attack) {
    const own = ++this.asked, {site, samples, model} = this;
    Object.assign(this, {image, attack});
    [...at("strip").children].forEach((each, i) => each.setAttribute("aria-pressed", i === image));
    const pixels = samples.of(image, attack), before = samples.clean(image);
    const most = 2.8 * Math.max(...site.epsilons);
    draw(at("image"), pixels, site.shape);
    draw(at("added"), pixels.map((value, i) => value - before[i]), site.shape, (value) => 0.5 + value / most);
    at("strength").textContent = strengthOf(site, attack);
    at("level").setAttribute("aria-valuetext", at("strength").textContent);
    const clean = await model.answer(before, site), began = performance.now();
    const answer = await model.answer(pixels, site), took = performance.now() - began;
    if (own !== this.asked) return;  // another was chosen meanwhile
    showVerdict(site, image, attack, answer, clean);
    showClasses(site.classes, softmax(answer.logits));
    showExperts(site, answer, clean);
    at("time").textContent = `answered in ${took.toFixed(1)} ms`;
  }
}

// All networks by name; the first is the one on the page, the others are loaded now.
async function everyModel(site, first) {
  const models = new Map([[site.models[0].name, first]]);
  for (const {name, file} of site.models.slice(1)) models.set(name, await Model.load(file));
  return models;
}

function showTimes(site, times) {
  const first = times[site.models[0].name];
  at("times").replaceChildren(...site.models.map(({name, macs}) => {
    const {median_ms: median, p10_ms: low, p90_ms: high} = times[name], row = make("tr");
    const cells = [counted(macs), `${ms(median)} ms`, `${(median / first.median_ms).toFixed(2)}x`];
    row.append(make("td", "", name), ...cells.map((cell) => make("td", "number", cell)));
    row.cells[2].append(make("small", "", `${ms(low)} to ${ms(high)}`));
    return row;
  }));
  at("times").parentElement.hidden = false;
  const runs = site.models.map(({name}) => `${times[name].runs} of ${name}`).join(", ");
  at("timed").textContent = `One image at a time, ${threads} thread${threads > 1 ? "s" : ""}; ${first.n} rounds, in each, in turns, the mean of ${runs}.`;
}

function offerTiming(site, samples, model) {
  let models = null;
  const button = at("start"), [own, ...others] = site.models.map(({name}) => name);
  const words = `Time ${own} against ${others.join(" and ")}`;
  at("timing").hidden = site.models.length < 2;
  button.textContent = words;
  button.onclick = async () => {
    button.disabled = true;
    try {
      button.textContent = "Loading ...";
      models ??= await everyModel(site, model);
      const tell = (round) => { button.textContent = `Round ${round} of ${ROUNDS} ...`; };
      showTimes(site, await timed(models, samples.clean, site.shape, ROUNDS, tell));
    } catch (error) {
      complain(error);
    }
    button.textContent = words;
    button.disabled = false;
  };
}

function complain(error) {
  at("status").textContent = error.message || String(error);
  at("status").className = "problem";
  at("status").hidden = false;
}

function say(site) {
  const [{macs}, ...others] = site.models, dense = others.find(({name}) => name === "dense");
  const cost = dense ? `, a dense network of its width ${counted(dense.macs)}` : "";
  at("facts").textContent = `${site.family} on ${site.backbone}, images of ${site.data}. Nothing leaves this browser. An image costs ${counted(macs)} multiply-accumulates${cost}.`;
  at("versions").textContent = `advmoe-deploy ${site.versions.advmoe_deploy}, ONNX Runtime Web ${runtime}, WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}. Bundle ${site.bundle.slice(0, 12)}.`;
}

async function begin() {
  const wanted = new URLSearchParams(location.search);
  try {
    const site = await readJson("site.json"), samples = samplesOf(await readFloats("samples.bin"), site);
    const model = await Model.load(site.models[0].file);
    say(site);
    if (wanted.has("check")) {
      at("status").textContent = "Checking ...";
      const rounds = Number(wanted.get("rounds")) || ROUNDS;
      const found = await check(site, await everyModel(site, model), samples, rounds);
      at("check").textContent = JSON.stringify(found, null, 1);
      at("check").hidden = false;
    } else {
      const page = new Page(site, samples, model);
      offerTiming(site, samples, model);
      at("main").hidden = false;
      await page.show(0, 0);
    }
    at("status").hidden = true;
  } catch (error) {
    complain(error);
  }
}

begin();
