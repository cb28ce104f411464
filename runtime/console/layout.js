// Where the nodes and edges of a graph go: layers from a depth-first search, few crossings, loops below.

const NODE = { width: 142, height: 50 };
const END = { width: 20, height: 20 };
const GAP = { along: 34, across: 22, loop: 16 };

/**
 * Places `nodes` ({id, label}) and `edges` ({source, target, conditional}) from left to right.
 * Gives `{ nodes: [{…, x, y, width, height}], edges: [{…, points}], width, height }`;
 * x and y are middles, an edge's points are joined by curves.
 */
export function layout(nodes, edges) {
  const places = new Map(nodes.map((node) => [node.id, { node, id: node.id, ...sizeOf(node) }]));
  const known = edges.filter((edge) => places.has(edge.source) && places.has(edge.target));
  const back = loops([...places.keys()], known);
  const forward = known.filter((edge) => !back.has(edge));

  rank(places, forward, known.length === 0);
  const chains = chain(places, forward);
  const layers = order(places, chains);
  const size = place(layers);
  return finish(places, chains, [...back], size);
}

const isEnd = (id) => id === "__start__" || id === "__end__";
const sizeOf = ({ id }) => (isEnd(id) ? END : NODE);

/** The edges that close a loop. */
function loops(ids, edges) {
  const out = new Map(ids.map((id) => [id, edges.filter((edge) => edge.source === id)]));
  const state = new Map();
  const back = new Set();
  const visit = (id) => {
    state.set(id, "open");
    for (const edge of out.get(id)) {
      if (state.get(edge.target) === "open") back.add(edge);
      else if (!state.has(edge.target)) visit(edge.target);
    }
    state.set(id, "closed");
  };
  const entered = new Set(edges.filter((e) => e.source !== e.target).map((e) => e.target));
  for (const id of [...ids.filter((id) => !entered.has(id)), ...ids]) {
    if (!state.has(id)) visit(id);
  }
  return back;
}

/** Each node one layer behind the last of those that lead to it. */
function rank(places, edges, unknown) {
  let index = 0;
  for (const place of places.values()) place.layer = unknown ? index++ : 0;
  for (let round = 0, moved = true; moved && round <= places.size; round++) {
    moved = false;
    for (const { source, target } of edges) {
      const least = places.get(source).layer + 1;
      if (places.get(target).layer < least) {
        places.get(target).layer = least;
        moved = true;
      }
    }
  }
  const last = Math.max(...[...places.values()].map((place) => place.layer));
  if (places.has("__end__")) places.get("__end__").layer = last;
}

/** Edges over several layers get a thin stand-in in each layer between, which keeps nodes away. */
function chain(places, edges) {
  let count = 0;
  return edges.map((edge) => {
    const from = places.get(edge.source);
    const to = places.get(edge.target);
    const stops = [from];
    for (let layer = from.layer + 1; layer < to.layer; layer++) {
      const thin = { id: `thin ${count++}`, layer, width: 0, height: 12, thin: true };
      places.set(thin.id, thin);
      stops.push(thin);
    }
    return { edge, stops: [...stops, to] };
  });
}

/** Layers whose places stand by the middle of their neighbours, sweeping to and fro. */
function order(places, chains) {
  const layers = [];
  for (const place of places.values()) (layers[place.layer] ??= []).push(place);
  const before = new Map();
  const behind = new Map();
  for (const { stops } of chains) {
    stops.slice(1).forEach((stop, index) => {
      push(before, stop, stops[index]);
      push(behind, stops[index], stop);
    });
  }
  layers.forEach((layer) => layer.forEach((place, index) => (place.at = index)));
  for (let sweep = 0; sweep < 8; sweep++) {
    const [neighbours, path] = sweep % 2 ? [behind, layers.toReversed()] : [before, layers];
    for (const layer of path) {
      for (const place of layer) {
        const near = neighbours.get(place);
        place.pull = near ? near.reduce((sum, other) => sum + other.at, 0) / near.length : place.at;
      }
      layer.sort((a, b) => a.pull - b.pull);
      layer.forEach((place, index) => (place.at = index));
    }
  }
  return layers;
}

const push = (map, key, value) => map.set(key, [...(map.get(key) ?? []), value]);

function place(layers) {
  const heights = layers.map((layer) =>
    layer.reduce((sum, { height }) => sum + height + GAP.across, -GAP.across));
  const height = Math.max(...heights);
  let x = 0;
  layers.forEach((layer, index) => {
    const width = Math.max(...layer.map((place) => place.width));
    let y = (height - heights[index]) / 2;
    for (const place of layer) {
      place.x = x + width / 2;
      place.span = width;
      place.y = y + place.height / 2;
      y += place.height + GAP.across;
    }
    x += width + GAP.along;
  });
  return { width: x - GAP.along, height };
}

function finish(places, chains, back, size) {
  const edges = chains.map(({ edge, stops }) => ({ ...edge, points: points(stops) }));
  let lane = 0;
  for (const edge of back) {
    lane += 1;
    edges.push({ ...edge, loop: true, ...under(places.get(edge.source), places.get(edge.target), size.height, lane) });
  }
  const nodes = [...places.values()].filter((place) => !place.thin)
    .map(({ node, x, y, width, height }) => ({ ...node, x, y, width, height }));
  return { nodes, edges, width: size.width, height: size.height + (lane ? lane * GAP.loop + 14 : 0) };
}

const points = (stops) =>
  stops.flatMap(({ x, y, width, span, thin }, index) =>
    thin ? [[x - span / 2, y], [x + span / 2, y]]
      : index === 0 ? [[x + width / 2, y]] : [[x - width / 2, y]]);

/** A loop leaves below, runs under everything, and comes back from below. */
function under(from, to, bottom, lane) {
  const y = bottom + lane * GAP.loop;
  const self = from === to;
  const aside = self ? 20 : 4 + 10 * lane; // loops of one node leave and arrive side by side
  const start = [from.x + aside, from.y + from.height / 2];
  const end = [to.x - aside, to.y + to.height / 2];
  return { points: [start, [start[0], y], [end[0], y], end] };
}

/** The points as the `d` of an SVG path. */
export function path({ points, loop }) {
  if (loop) {
    const [a, b, c, d] = points;
    const turn = Math.min(10, Math.abs(c[0] - b[0]) / 2);
    const side = c[0] < b[0] ? -turn : turn;
    return `M${a}V${b[1] - turn}q0,${turn} ${side},${turn}H${c[0] - side}q${side},0 ${side},${-turn}V${d[1] + 2}`;
  }
  let d = `M${points[0]}`;
  for (let index = 1; index < points.length; index++) {
    const [x0, y0] = points[index - 1];
    const [x1, y1] = points[index];
    const bend = (x1 - x0) / 2;
    d += `C${x0 + bend},${y0} ${x1 - bend},${y1} ${x1},${y1}`;
  }
  return d;
}
