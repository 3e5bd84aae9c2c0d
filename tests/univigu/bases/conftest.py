from base_folders import i2v_folder, images, text_parts, ti2v_folder

__all__ = ["i2v_folder", "images", "text_parts", "ti2v_folder"]
