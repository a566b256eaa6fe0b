// node transformers_js.mjs FOLDER CLASS N IDS… → greedy token ids by transformers.js, as JSON
import { basename, dirname, join } from 'node:path';
import * as transformers from '@huggingface/transformers';

const [folder, kind, n, ...ids] = process.argv.slice(2);
transformers.env.allowRemoteModels = false;
transformers.env.localModelPath = join(dirname(folder), '/');
const model = await transformers[kind].from_pretrained(basename(folder));
const input_ids = new transformers.Tensor('int64', ids.map(BigInt), [1, ids.length]);
const attention_mask = new transformers.Tensor('int64', ids.map(() => 1n), [1, ids.length]);
const found = await model.generate({ input_ids, attention_mask, max_new_tokens: Number(n), do_sample: false });
console.log(JSON.stringify(Array.from(found.tolist()[0].slice(ids.length), Number)));
