// SPDX-License-Identifier: GPL-2.0
/* The operations: direct mapping, and a write to what the device wrote. */
#include <linux/dma-direct.h>
#include <linux/memremap.h>
#include <linux/mm.h>
#include <linux/scatterlist.h>

#include "dma.h"
#include "uvmm_bridge.h"

static bool uvmm_device_writes(enum dma_data_direction dir)
{
	return dir == DMA_FROM_DEVICE || dir == DMA_BIDIRECTIONAL;
}

static void uvmm_count(struct device *dev, enum dma_data_direction dir, int by)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);

	if (dma && uvmm_device_writes(dir))
		this_cpu_add(*dma->live, by);
}

/* The device is done with this for now. */
static void uvmm_wrote(struct device *dev, dma_addr_t addr, size_t size,
		       enum dma_data_direction dir)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);

	if (dma && uvmm_device_writes(dir) && READ_ONCE(dma->bridge->dirtying))
		uvmm_touch(phys_to_virt(dma_to_phys(dev, addr)), size);
}

/*
 * The device cannot reach all of memory: the kernel has to bounce, and the
 * promise is void. What was mapped before is unmapped as if by the kernel.
 */
static void uvmm_step_aside(struct device *dev)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);
	struct uvmm_bridge *bridge = dma ? dma->bridge : NULL;

	if (bridge)
		uvmm_promise(bridge, false);
	if (uvmm_dma_remove(dev))
		pr_warn("%s: does not reach all memory: use swiotlb=force\n",
			dev_name(dev));
}

static dma_addr_t uvmm_map(struct device *dev, struct page *page,
			   unsigned long offset, size_t size,
			   enum dma_data_direction dir, unsigned long attrs)
{
	dma_addr_t addr = phys_to_dma(dev, page_to_phys(page)) + offset;

	if (is_pci_p2pdma_page(page))
		return DMA_MAPPING_ERROR;
	if (unlikely(!dma_capable(dev, addr, size, true))) {
		uvmm_step_aside(dev);
		return dma_map_page_attrs(dev, page, offset, size, dir, attrs);
	}
	uvmm_count(dev, dir, 1);
	return addr;
}

static void uvmm_unmap(struct device *dev, dma_addr_t addr, size_t size,
		       enum dma_data_direction dir, unsigned long attrs)
{
	uvmm_wrote(dev, addr, size, dir);
	uvmm_count(dev, dir, -1);
}

/* Registers of another device: not memory, so nothing is logged of it. */
static dma_addr_t uvmm_map_resource(struct device *dev, phys_addr_t phys,
				    size_t size, enum dma_data_direction dir,
				    unsigned long attrs)
{
	return dma_capable(dev, phys, size, false) ? phys : DMA_MAPPING_ERROR;
}

#ifdef UVMM_MAP_PHYS
static dma_addr_t uvmm_map_phys(struct device *dev, phys_addr_t phys,
				size_t size, enum dma_data_direction dir,
				unsigned long attrs)
{
	if (attrs & DMA_ATTR_MMIO)
		return uvmm_map_resource(dev, phys, size, dir, attrs);
	return uvmm_map(dev, pfn_to_page(PHYS_PFN(phys)), offset_in_page(phys),
			size, dir, attrs);
}

static void uvmm_unmap_phys(struct device *dev, dma_addr_t addr, size_t size,
			    enum dma_data_direction dir, unsigned long attrs)
{
	if (!(attrs & DMA_ATTR_MMIO))
		uvmm_unmap(dev, addr, size, dir, attrs);
}
#endif

static void uvmm_unmap_sg(struct device *dev, struct scatterlist *list,
			  int count, enum dma_data_direction dir,
			  unsigned long attrs)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(list, sg, count, i)
		dma_unmap_page_attrs(dev, sg_dma_address(sg), sg_dma_len(sg),
				     dir, attrs);
}

static int uvmm_map_sg(struct device *dev, struct scatterlist *list, int count,
		       enum dma_data_direction dir, unsigned long attrs)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(list, sg, count, i) {
		sg->dma_address = uvmm_map(dev, sg_page(sg), sg->offset,
					   sg->length, dir, attrs);
		if (sg->dma_address == DMA_MAPPING_ERROR) {
			uvmm_unmap_sg(dev, list, i, dir, attrs);
			return -EIO;
		}
		sg_dma_len(sg) = sg->length;
	}
	return count;
}

static void uvmm_sync_sg(struct device *dev, struct scatterlist *list,
			 int count, enum dma_data_direction dir)
{
	struct scatterlist *sg;
	int i;

	for_each_sg(list, sg, count, i)
		uvmm_wrote(dev, sg_dma_address(sg), sg->length, dir);
}

/* Pages that the device reaches with its mask for such memory. */
static struct page *uvmm_get_pages(struct device *dev, size_t size,
				   dma_addr_t *addr, gfp_t gfp)
{
	u64 mask = min_not_zero(dev->coherent_dma_mask, dev->bus_dma_limit);
	static const gfp_t zones[] = { 0, GFP_DMA32, GFP_DMA };
	int i = mask < DMA_BIT_MASK(32) ? 2 : mask < DMA_BIT_MASK(64) ? 1 : 0;
	int order = get_order(size);
	struct uvmm_dma *dma = uvmm_dma_of(dev);

	if (dma && (mask & dma->required_mask) == dma->required_mask)
		i = 0;
	for (; i < ARRAY_SIZE(zones); i++) {
		struct page *page = alloc_pages_node(dev_to_node(dev),
				gfp | zones[i] | __GFP_ZERO, order);

		if (!page)
			return NULL;
		*addr = phys_to_dma(dev, page_to_phys(page));
		if (*addr + size - 1 <= mask)
			return page;
		__free_pages(page, order);
	}
	return NULL;
}

static void *uvmm_alloc(struct device *dev, size_t size, dma_addr_t *addr,
			gfp_t gfp, unsigned long attrs)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);
	struct page *page;

	if (dma)
		atomic_inc(&dma->allocating);
	if (attrs & DMA_ATTR_NO_WARN)
		gfp |= __GFP_NOWARN;
	size = PAGE_ALIGN(size);
	page = uvmm_get_pages(dev, size, addr, gfp);
	if (page && dma &&
	    !uvmm_coherent_add(dma, page_address(page), size, gfp)) {
		__free_pages(page, get_order(size));
		page = NULL;
	}
	if (dma)
		atomic_dec(&dma->allocating);
	if (page && (attrs & DMA_ATTR_NO_KERNEL_MAPPING))
		return page;
	return page ? page_address(page) : NULL;
}

static void uvmm_free(struct device *dev, size_t size, void *memory,
		      dma_addr_t addr, unsigned long attrs)
{
	struct page *page = attrs & DMA_ATTR_NO_KERNEL_MAPPING ?
		memory : virt_to_page(memory);
	struct uvmm_dma *dma = uvmm_dma_of(dev);

	/* What the device left in it is read by nobody any more. */
	if (dma)
		uvmm_coherent_forget(dma, page_address(page));
	__free_pages(page, get_order(size));
}

/* Memory that is the device's or the processor's by turns, as if mapped. */
static struct page *uvmm_alloc_pages(struct device *dev, size_t size,
				     dma_addr_t *addr,
				     enum dma_data_direction dir, gfp_t gfp)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);
	struct page *page;

	if (dma)
		atomic_inc(&dma->allocating);
	page = uvmm_get_pages(dev, PAGE_ALIGN(size), addr, gfp);
	if (page)
		uvmm_count(dev, dir, 1);
	if (dma)
		atomic_dec(&dma->allocating);
	return page;
}

static void uvmm_free_pages(struct device *dev, size_t size, struct page *page,
			    dma_addr_t addr, enum dma_data_direction dir)
{
	uvmm_count(dev, dir, -1);
	__free_pages(page, get_order(size));
}

static int uvmm_mmap(struct device *dev, struct vm_area_struct *vma,
		     void *memory, dma_addr_t addr, size_t size,
		     unsigned long attrs)
{
	unsigned long pages = PAGE_ALIGN(size) >> PAGE_SHIFT;
	unsigned long pfn = PHYS_PFN(dma_to_phys(dev, addr));

	if (vma->vm_pgoff >= pages || vma_pages(vma) > pages - vma->vm_pgoff)
		return -ENXIO;
	return remap_pfn_range(vma, vma->vm_start, pfn + vma->vm_pgoff,
			       vma_pages(vma) << PAGE_SHIFT, vma->vm_page_prot);
}

static int uvmm_get_sgtable(struct device *dev, struct sg_table *table,
			    void *memory, dma_addr_t addr, size_t size,
			    unsigned long attrs)
{
	struct page *page = pfn_to_page(PHYS_PFN(dma_to_phys(dev, addr)));
	int error = sg_alloc_table(table, 1, GFP_KERNEL);

	if (!error)
		sg_set_page(table->sgl, page, PAGE_ALIGN(size), 0);
	return error;
}

static u64 uvmm_required_mask(struct device *dev)
{
	struct uvmm_dma *dma = uvmm_dma_of(dev);

	return dma ? dma->required_mask : DMA_BIT_MASK(64);
}

const struct dma_map_ops uvmm_dma_ops = {
	.alloc			= uvmm_alloc,
	.free			= uvmm_free,
#ifdef UVMM_ALLOC_PAGES_OP
	.alloc_pages_op		= uvmm_alloc_pages,
#else
	.alloc_pages		= uvmm_alloc_pages,
#endif
	.free_pages		= uvmm_free_pages,
	.mmap			= uvmm_mmap,
	.get_sgtable		= uvmm_get_sgtable,
#ifdef UVMM_MAP_PHYS
	.map_phys		= uvmm_map_phys,
	.unmap_phys		= uvmm_unmap_phys,
#else
	.map_page		= uvmm_map,
	.unmap_page		= uvmm_unmap,
	.map_resource		= uvmm_map_resource,
#endif
	.map_sg			= uvmm_map_sg,
	.unmap_sg		= uvmm_unmap_sg,
	.sync_single_for_cpu	= uvmm_wrote,
	.sync_sg_for_cpu	= uvmm_sync_sg,
	.get_required_mask	= uvmm_required_mask,
};
